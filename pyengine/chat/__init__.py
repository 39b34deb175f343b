"""Conversations: how turns become prompts, and what to do when the context does not hold them."""
