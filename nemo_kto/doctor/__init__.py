"""What ``nemo-kto doctor`` looks at: one probe per file. Each returns a finding; a broken machine raises nothing."""
