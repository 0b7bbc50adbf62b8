/* What `lanes.h` and who includes it have defined. */
#undef INLINE
#undef CONCAT
#undef NAMED
#undef FN
#undef WORDS
#undef FLOATS
#undef STEP
#undef LANES
#undef NAME
#undef TARGET
#undef BYTES
