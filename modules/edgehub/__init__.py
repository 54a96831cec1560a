"""edgehub: bridges the bus to a KubeEdge CloudHub."""
