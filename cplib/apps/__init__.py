"""For people: the command line, notebooks, own images, download, Colab, the demo set."""
