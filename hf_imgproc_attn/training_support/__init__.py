"""What the training scripts share: arguments, data, models to start from, run records, metrics and evaluation.

Nothing is imported here: ``arguments``, ``argument_parser`` and ``errors`` import neither torch nor transformers, so
that ``--help`` is instant.
"""
