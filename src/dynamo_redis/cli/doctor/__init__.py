"""`dynamo-redis doctor`: checks a Redis before, or while, a deployment uses it.

`examine` asks the server everything in a few round trips and tries what processes do. `checks` judges the
answers: each check is a function of the examination that returns one finding. `report` prints the findings.
"""
