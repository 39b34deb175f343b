"""What is loaded: configurations, checkpoint files and tokenizers.

Nothing is imported here, so that each caller pays for what it uses.
"""
