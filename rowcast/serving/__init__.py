"""HTTP in front of the engine: an OpenAI-compatible server, on one machine or as a Ray Serve application.

May import everything but `cli`; nothing else imports it.
"""
