"""The chapters on a stand-in for Colab: `make colab`."""
