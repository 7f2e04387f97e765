"""The gateway: video jobs that outlive a connection, and the page, in front of the Dynamo frontend."""
