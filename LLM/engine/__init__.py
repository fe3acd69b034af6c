"""The generation engine: token ids in, text out, on one thread of its own. Knows no text templates and no vendor names."""
