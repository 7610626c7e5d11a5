"""Numbers that stand among token ids and labels. No torch here: the data floor reads them without it."""

SLOT = -1
"""The id that marks a pseudo-token in a batch before `graft.prepare`: a row of no embedding."""
IGNORED = -100
"""The label of a token that gives no loss."""
