"""The application for Ray Serve: `serve run serve.app:app run=RUN`."""

from rayml.serving.app import build as app

__all__ = ["app"]
