"""`paystream demo`: payments of every kind through the whole pipeline, and a check of the promises on what came out.

Flow: traffic (what callers do, and what they were told) -> evidence (the API, the topics, the ledger) -> promises (verdicts) -> command (shows).
"""
