"""What a request asks for: sampling parameters."""
