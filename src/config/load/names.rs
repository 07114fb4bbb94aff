//! What names tell: the nearest valid one, and whether a value is secret.

/// Words between underscores that mark a value as secret. Environment variables of workers carry such names too.
const SECRET_WORDS: &[&str] = &["token", "secret", "password", "passwd", "key", "credentials", "apikey"];
/// Last words that say that the value only leads to a secret: the name of a file or of a variable.
const LEADS_TO_SECRET: &[&str] = &["file", "path", "dir", "var"];

/// Whether a setting or variable of this name holds a secret, which is shown nowhere.
pub(in crate::config) fn is_secret(name: &str) -> bool {
    let name = name.to_lowercase().replace('-', "_");
    let last = name.rsplit('_').next().unwrap_or_default();
    !LEADS_TO_SECRET.contains(&last) && name.split('_').any(|word| SECRET_WORDS.contains(&word))
}

/// Whether `given` is so close to `name` that it must be a slip: one letter in a short name, up to three in a long one.
pub(in crate::config) fn is_slip(given: &str, name: &str) -> bool {
    let given = given.replace('-', "_").to_lowercase();
    let allowed = match name.len() {
        0..=3 => 1,
        4..=8 => 2,
        _ => 3,
    };
    strsim::damerau_levenshtein(&given, name) <= allowed && given.chars().next().is_some()
}

/// The valid name most like `given`, unless none is like it at all.
pub(in crate::config) fn nearest<'n>(given: &str, names: impl IntoIterator<Item = &'n str>) -> Option<&'n str> {
    let given = given.replace('-', "_").to_lowercase();
    names
        .into_iter()
        .map(|name| (likeness(&given, &name.to_lowercase()), name))
        .max_by(|(a, _), (b, _)| a.total_cmp(b))
        .filter(|(likeness, _)| *likeness >= 0.5)
        .map(|(_, name)| name)
}

/// From 0 to 1. A name that holds the other whole is alike too: `gpu_ids` and `prefill_gpu_ids`.
fn likeness(given: &str, name: &str) -> f64 {
    let edits = strsim::normalized_damerau_levenshtein(given, name);
    let holds = given.len() >= 3 && (name.contains(given) || given.contains(name));
    if holds { edits.max(0.6) } else { edits }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slip_is_close_and_another_word_is_not() {
        let cases = [
            ("pd_disag", "pd_disagg", true),
            ("pd-disagg", "pd_disagg", true),
            ("proxi", "proxy", true),
            ("kw", "kv", true),
            ("interference", "inference", true),
            ("wandb", "model", false),
            ("ckpt", "kv", false),
            ("slurm", "proxy", false),
            ("log", "kv", false),
            ("output_dir", "model", false),
        ];
        for (given, name, want) in cases {
            assert_eq!(is_slip(given, name), want, "{given} for {name}");
        }
    }

    #[test]
    fn names_tell_secrets() {
        for name in ["admin_token", "HF_TOKEN", "VLLM_API_KEY", "api-key", "AWS_SECRET_ACCESS_KEY", "db_password"] {
            assert!(is_secret(name), "{name}");
        }
        for name in ["TOKENIZERS_PARALLELISM", "secret_file", "api_key_var", "tokenizer", "max_model_len"] {
            assert!(!is_secret(name), "{name}");
        }
    }

    #[test]
    fn the_nearest_name_is_found_or_none_is_offered() {
        let names = ["prefill_gpu_ids", "decode_gpu_ids", "host", "auto_ports"];
        assert_eq!(nearest("prefil_gpu_ids", names), Some("prefill_gpu_ids"));
        assert_eq!(nearest("auto-port", names), Some("auto_ports"));
        assert_eq!(nearest("Host", names), Some("host"));
        assert_eq!(nearest("zzz", names), None);
    }
}
