"""The suite `index`: the prefix index beside a radix tree."""
