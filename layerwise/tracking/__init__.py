"""Services that show curves, one per file: what a run tells goes to the one that `--log` names, beside metrics.jsonl."""
