"""The proof that a rewritten graph computes the original: what each rank holds of every value.

Nothing here is shared with the passes that analyse and rewrite, but the table of operators' rows.
"""
