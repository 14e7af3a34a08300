"""The engine process: it owns the model, and messages are the only way in.

`plan` and `messages` are contracts and import no torch, so that the server can speak them.
"""
