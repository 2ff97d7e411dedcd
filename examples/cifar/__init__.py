"""The rooms of `cifar_resnet.py`: data, models, training and report."""
