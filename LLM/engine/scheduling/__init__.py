"""Which request goes forward next. Knows no model, no tensor and no clock."""
