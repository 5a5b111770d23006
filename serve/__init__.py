"""The HTTP server over engines: it needs the runtime side of the project, FastAPI, uvicorn and a metrics library."""
