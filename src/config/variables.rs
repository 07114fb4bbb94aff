//! Names of environment variables: which ones hold secrets, and which ones NIXL and its backends read.

/// Words that mark a variable as secret, as whole words between underscores: `TOKENIZERS_PARALLELISM` is none.
const SECRET_WORDS: &[&str] = &["TOKEN", "SECRET", "PASSWORD", "PASSWD", "KEY", "CREDENTIALS", "APIKEY"];

/// Beginnings of the variables that may be set in `[kv.nixl.env]`: NIXL itself, UCX, libfabric, Mooncake, GDS, and the RDMA
/// libraries below them.
const NIXL_PREFIXES: &[&str] = &["NIXL_", "UCX_", "FI_", "MC_", "CUFILE_", "IBV_", "RDMAV_", "MLX4_", "MLX5_"];

/// Whether a variable of this name holds a secret. One that names a file does not: the file is the secret.
pub fn is_secret_variable(name: &str) -> bool {
    let name = name.to_ascii_uppercase();
    let names_a_file = ["FILE", "PATH", "DIR"].iter().any(|end| name.ends_with(end));
    !names_a_file && name.split('_').any(|word| SECRET_WORDS.contains(&word))
}

/// Why a variable may not be set for NIXL, with what to do; `None`: it may.
pub(super) fn nixl_fault(name: &str, value: &str) -> Option<(String, String)> {
    let is_plain = |c: char| c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_';
    let known = NIXL_PREFIXES.iter().any(|prefix| name.len() > prefix.len() && name.starts_with(prefix));
    if is_secret_variable(name) {
        let mend = "put it into the environment that `pdlink up` is started in; it is handed down";
        return Some(("looks like a secret, which is not written into a configuration".to_owned(), mend.to_owned()));
    }
    if !known || !name.chars().all(is_plain) {
        let mend = format!(
            "names here begin with {}; other variables of a worker belong into pd_disagg.prefill_env and decode_env",
            NIXL_PREFIXES.join(", ")
        );
        return Some(("is no variable of NIXL or of what it runs on".to_owned(), mend));
    }
    let broken = value.chars().any(char::is_control);
    broken.then(|| ("has a control character in its value".to_owned(), "write its value on one line".to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_tell_secrets() {
        for name in ["HF_TOKEN", "VLLM_API_KEY", "AWS_SECRET_ACCESS_KEY", "db_password"] {
            assert!(is_secret_variable(name), "{name}");
        }
        for name in ["TOKENIZERS_PARALLELISM", "PDLINK_SECRET_FILE", "CUDA_VISIBLE_DEVICES", "HF_TOKEN_PATH"] {
            assert!(!is_secret_variable(name), "{name}");
        }
    }

    #[test]
    fn only_what_nixl_reads_and_is_no_secret_may_be_set() {
        for name in ["UCX_TLS", "NIXL_LOG_LEVEL", "FI_PROVIDER", "MLX5_SINGLE_THREADED"] {
            assert_eq!(nixl_fault(name, "x"), None, "{name}");
        }
        for name in ["PATH", "LD_PRELOAD", "UCX_", "ucx_tls", "UCX TLS", "UCX_A=B", "NIXL_ETCD_PASSWORD", ""] {
            assert!(nixl_fault(name, "x").is_some(), "{name}");
        }
        assert!(nixl_fault("UCX_TLS", "tcp\nrc").is_some());
    }
}
