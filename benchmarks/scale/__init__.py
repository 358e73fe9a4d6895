"""Suite `scale`: one Redis under a thousand workers and eight routers."""
