"""Workers that train one student together, and how its gradients come together."""
