//! Keeps secrets out of what is shown and out of command lines, which every user of the host can read.

/// Shown instead of a secret value.
const HIDDEN: &str = "***";

/// Words that mark a variable as secret, as whole words between underscores: `TOKENIZERS_PARALLELISM` is none.
const SECRET_WORDS: &[&str] = &["TOKEN", "SECRET", "PASSWORD", "PASSWD", "KEY", "CREDENTIALS", "APIKEY"];

/// Whether a variable of this name holds a secret. One that names a file does not: the file is the secret.
fn is_secret(name: &str) -> bool {
    let name = name.to_ascii_uppercase();
    let names_a_file = ["FILE", "PATH", "DIR"].iter().any(|end| name.ends_with(end));
    !names_a_file && name.split('_').any(|word| SECRET_WORDS.contains(&word))
}

/// The value as it may be shown.
pub(super) fn value<'a>(name: &str, value: &'a str) -> &'a str {
    if is_secret(name) { HIDDEN } else { value }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_tell_secrets() {
        for name in ["HF_TOKEN", "VLLM_API_KEY", "AWS_SECRET_ACCESS_KEY", "db_password"] {
            assert!(is_secret(name), "{name}");
        }
        for name in ["TOKENIZERS_PARALLELISM", "PDLINK_SECRET_FILE", "CUDA_VISIBLE_DEVICES", "HF_TOKEN_PATH"] {
            assert!(!is_secret(name), "{name}");
        }
    }
}
