"""The model folders there are, and what is known of each. Knows no clients and loads nothing."""
