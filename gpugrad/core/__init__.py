"""The engine: primitives, graph, tensors, transforms. It knows no formula."""
