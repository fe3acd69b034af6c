"""What clients wrote becomes a prompt's token ids, within bounds. Knows no runners, no engines and no clients."""
