"""What tests share: configs, models, comparisons, processes, and stand-ins for clouds and schedulers."""
