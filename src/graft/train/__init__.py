"""Training: one YAML (`config`), on `transformers.Trainer` (`trainer`), from data to a saved adapter (`run`)."""
