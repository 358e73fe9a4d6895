"""Run the command line as `python -m dynamo_redis`."""

from dynamo_redis.cli import main

if __name__ == "__main__":
    main()
