"""Model cards, their files and chat templates, as frontend, engines and router need them."""
