"""Pure: frames in, verdict out. No Prefect, no torch."""
