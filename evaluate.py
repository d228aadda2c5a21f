"""Metrics of finished runs (in metrics.py) and their report."""

from metrics import (  # noqa: F401  what other scripts use by the name evaluate.…
    auroc, average_precision, balanced_accuracy, brier, choose_threshold, expected_calibration_error, f1,
    of_predictions, precision, sensitivity, specificity, summarise, weighted_f1)
