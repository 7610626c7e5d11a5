"""Evaluation: metrics (`metrics`), generation (`generate`), likelihoods (`score`), and all of it by entry (`run`)."""
