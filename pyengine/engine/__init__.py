"""Who runs when: requests, the scheduler that picks each step's tokens, and the step itself."""
