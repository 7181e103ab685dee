"""One file per runtime that a worker loads on any host: standard library, numpy and the runtime only."""
