"""The losses as one would write them in a training script: for each the fastest such form that is known.

A form takes what the loss takes and gives its mean over the samples, at the loss's default options. Of a loss that
learns, the function takes the library's module and returns the form, which shares the module's weights.
"""
