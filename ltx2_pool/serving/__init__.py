"""The worker: admission, decision, supervision, Dynamo."""
