"""Self-contained HTML pages about bundles and runs: no network, no scripts."""
