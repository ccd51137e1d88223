"""HTTP in front of the engine: an OpenAI-compatible server.

May import everything but `cli`; nothing else imports it. Under construction.
"""
