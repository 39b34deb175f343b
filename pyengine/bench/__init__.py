"""Speed of an ``LLM``: fixed workloads, what they cost, and what the machine allows.

Above ``LLM``, below the command line; nothing else imports it.
"""
