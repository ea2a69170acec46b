"""What a slider does, measured on images."""
