"""What a run says about itself: metrics, timing, charts, the closing table, the report. Torch-free."""
