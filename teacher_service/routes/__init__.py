"""The HTTP routes: each reads its request, asks the layers below, and writes its answer."""
