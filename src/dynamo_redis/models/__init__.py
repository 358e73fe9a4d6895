"""Model cards, model files and chat templates, for frontends, engines and routers."""
