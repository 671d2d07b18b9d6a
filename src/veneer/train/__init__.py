"""The training command `veneer train` and its companions; needs the `train` extra.

Nothing here is imported by `import veneer`, and nothing here imports transformers before a command needs it.
"""
