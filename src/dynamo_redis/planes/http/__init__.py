"""The request plane over HTTP/2: a POST a request, which proxies, load balancers and curl understand."""
