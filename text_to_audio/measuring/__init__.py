"""How well a model does, and how that is shown: metrics, evaluation, baseline, curves, report, summary, model card."""
