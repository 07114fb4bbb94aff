//! The engine's HTTP behaviour: what clients of OpenAI and vLLM rely on, and what becomes of bad input.

#[path = "support/engine.rs"]
mod engine;

use engine::{MODEL, Worker, greedy, prompt, small};
use reqwest::StatusCode;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

fn text(answer: &Value) -> &str {
    answer["choices"][0]["text"].as_str().expect("text")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_head_that_cannot_be_read_is_refused_in_the_same_form() {
    let worker = Worker::monolithic(small()).await;
    let address = worker.url.strip_prefix("http://").expect("an address");
    let huge = format!("GET /health HTTP/1.1\r\nhost: x\r\nx-long: {}\r\n\r\n", "y".repeat(2_000_000));
    for (status, head) in [(431, huge.as_str()), (400, "what is this\r\n\r\n")] {
        let mut stream = TcpStream::connect(address).await.expect("listening");
        stream.write_all(head.as_bytes()).await.expect("read, if only to be dropped");
        stream.shutdown().await.expect("open");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.expect("no reset");
        let (head, body) = answer.split_once("\r\n\r\n").expect("a head");
        assert!(head.starts_with(&format!("HTTP/1.1 {status} ")), "{answer}");
        let error: Value = serde_json::from_str(body).unwrap_or_else(|_| panic!("not JSON: {answer}"));
        assert_eq!(error["error"]["code"], status, "{answer}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_input_is_refused_in_openais_form() {
    let worker = Worker::monolithic(small()).await;
    let completion = |extra: Value| {
        let mut body = json!({"model": MODEL, "prompt": "hi", "max_tokens": 1});
        body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        body.to_string()
    };
    let chat = |messages: Value| json!({"model": MODEL, "messages": messages}).to_string();
    let (c, h) = ("/v1/completions", "/v1/chat/completions");
    // (name, method, path, body, status, field at fault)
    type Case = (&'static str, &'static str, &'static str, String, u16, Option<&'static str>);
    let cases: Vec<Case> = vec![
        ("malformed JSON", "POST", c, "{".into(), 400, None),
        ("no body", "POST", c, String::new(), 400, None),
        ("not UTF-8 escapes", "POST", c, r#"{"prompt": "\ud800"}"#.into(), 400, None),
        ("not an object", "POST", c, "[1]".into(), 400, None),
        ("too deep", "POST", c, "[".repeat(100_000), 400, None),
        ("no model", "POST", c, r#"{"prompt": "hi"}"#.into(), 400, Some("model")),
        ("model of a wrong type", "POST", c, r#"{"model": 3, "prompt": "hi"}"#.into(), 400, Some("model")),
        ("unknown model", "POST", c, r#"{"model": "gpt", "prompt": "hi"}"#.into(), 404, Some("model")),
        ("no prompt", "POST", c, json!({"model": MODEL}).to_string(), 400, Some("prompt")),
        ("empty prompt", "POST", c, completion(json!({"prompt": ""})), 400, Some("prompt")),
        ("token beyond the vocabulary", "POST", c, completion(json!({"prompt": [1, 70000]})), 400, Some("prompt")),
        ("max_tokens of a wrong type", "POST", c, completion(json!({"max_tokens": "1"})), 400, Some("max_tokens")),
        ("max_tokens 0", "POST", c, completion(json!({"max_tokens": 0})), 400, Some("max_tokens")),
        ("max_tokens negative", "POST", c, completion(json!({"max_tokens": -1})), 400, Some("max_tokens")),
        ("context too long", "POST", c, completion(json!({"max_tokens": 1023})), 400, Some("max_tokens")),
        (
            "max_tokens beyond all numbers",
            "POST",
            c,
            completion(json!({"max_tokens": u64::MAX})),
            400,
            Some("max_tokens"),
        ),
        ("prompt too long", "POST", c, completion(json!({"prompt": "x".repeat(1024)})), 400, Some("max_tokens")),
        ("min above max", "POST", c, completion(json!({"min_tokens": 2})), 400, Some("min_tokens")),
        ("n 0", "POST", c, completion(json!({"n": 0})), 400, Some("n")),
        ("n too large", "POST", c, completion(json!({"n": 1000})), 400, Some("n")),
        ("temperature", "POST", c, completion(json!({"temperature": -1})), 400, Some("temperature")),
        ("top_p", "POST", c, completion(json!({"top_p": 0})), 400, Some("top_p")),
        ("top_k", "POST", c, completion(json!({"top_k": -2})), 400, Some("top_k")),
        ("logprobs", "POST", c, completion(json!({"logprobs": 21})), 400, Some("logprobs")),
        ("empty stop", "POST", c, completion(json!({"stop": ""})), 400, Some("stop")),
        ("stop of a wrong type", "POST", c, completion(json!({"stop": 3})), 400, Some("stop")),
        ("stream_options alone", "POST", c, completion(json!({"stream_options": {}})), 400, Some("stream_options")),
        (
            "KV parameters of a wrong type",
            "POST",
            c,
            completion(json!({"kv_transfer_params": 3})),
            400,
            Some("kv_transfer_params"),
        ),
        (
            "KV parameters of a client",
            "POST",
            c,
            completion(json!({"kv_transfer_params": {"do_remote_prefill": true, "remote_block_ids": [[0]]}})),
            400,
            Some("kv_transfer_params"),
        ),
        ("no messages", "POST", h, json!({"model": MODEL}).to_string(), 400, Some("messages")),
        ("empty messages", "POST", h, chat(json!([])), 400, Some("messages")),
        ("message without a role", "POST", h, chat(json!([{"content": "x"}])), 400, Some("messages")),
        (
            "image part",
            "POST",
            h,
            chat(json!([{"role": "user", "content": [{"type": "image_url"}]}])),
            400,
            Some("messages"),
        ),
        ("tokens missing", "POST", "/v1/chat/completions/tokens", chat(json!([])), 400, Some("tokens")),
        (
            "tokens of a wrong type",
            "POST",
            "/chat/completions/tokens",
            json!({"model": MODEL, "tokens": ["a"]}).to_string(),
            400,
            Some("tokens"),
        ),
        ("unknown route", "POST", "/v1/nothing", "{}".into(), 404, None),
        ("weights come from a folder", "POST", "/update_weights", "{}".into(), 400, Some("weight_dir")),
        ("wrong method", "GET", c, String::new(), 405, None),
        ("nothing to tokenize", "POST", "/tokenize", "{}".into(), 400, Some("prompt")),
        ("nothing to detokenize", "POST", "/detokenize", "{}".into(), 400, Some("tokens")),
    ];
    for (name, method, path, body, status, param) in cases {
        let request = worker.client.request(method.parse().unwrap(), format!("{}{path}", worker.url)).body(body);
        let response = request.send().await.expect("an answer");
        let got = response.status().as_u16();
        let error: Value = response.json().await.unwrap_or_else(|_| panic!("case: {name}: not JSON"));
        assert_eq!(got, status, "case: {name}: {error}");
        assert_eq!(error["error"]["code"], status, "case: {name}");
        assert_eq!(error["error"]["param"].as_str(), param, "case: {name}: {error}");
        assert!(error["error"]["message"].as_str().is_some_and(|m| !m.is_empty()), "case: {name}: {error}");
        assert!(error["error"]["type"].is_string(), "case: {name}: {error}");
    }
    for (path, field, value) in
        [(c, "stop", json!(5)), (c, "stop", json!([5])), (h, "messages", json!([{"role": "user", "content": 5}]))]
    {
        let mut body = json!({"model": MODEL, "prompt": "hi", "messages": [{"role": "user", "content": "hi"}]});
        body[field] = value;
        let request = worker.client.post(format!("{}{path}", worker.url)).body(body.to_string());
        let error: Value = request.send().await.expect("an answer").json().await.expect("JSON");
        let message = error["error"]["message"].as_str().expect("a message");
        assert!(message.contains("must be a string or a list of"), "the types that fit are named: {message}");
    }
    worker.until_at_rest().await;
    assert!(worker.stop().await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_beyond_the_limit_is_refused() {
    let worker = Worker::monolithic(small()).await;
    let body = vec![b' '; (64 << 20) + 1];
    let response = worker.client.post(format!("{}/v1/completions", worker.url)).body(body).send().await;
    // The server may hang up on a client that keeps sending what it has refused.
    if let Ok(response) = response {
        assert_eq!(response.status(), StatusCode::PAYLOAD_TOO_LARGE);
    }
    assert_eq!(worker.greedy(&[1], 1).await.len(), 1, "it serves on");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_completion_has_the_shape_that_clients_read() {
    let worker = Worker::monolithic(small()).await;
    let body =
        json!({"model": MODEL, "prompt": "Hello", "max_tokens": 5, "ignore_eos": true, "return_token_ids": true});
    let answer = worker.ask("/v1/completions", &body).await;
    assert_eq!(answer["object"], "text_completion");
    assert!(answer["id"].as_str().unwrap().starts_with("cmpl-"));
    assert_eq!(answer["choices"][0]["finish_reason"], "length");
    assert_eq!(answer["choices"][0]["prompt_token_ids"], json!([72, 101, 108, 108, 111]));
    assert_eq!(answer["usage"]["prompt_tokens"], 5);
    assert_eq!(answer["usage"]["completion_tokens"], 5);
    assert_eq!(answer["usage"]["total_tokens"], 10);
    assert_eq!(answer["kv_transfer_params"], Value::Null);
    let bytes: Vec<u32> = text(&answer).bytes().map(u32::from).collect();
    assert_eq!(answer["choices"][0]["token_ids"], json!(bytes), "one token is one character");
    let again = worker.ask("/v1/completions", &body).await;
    assert_eq!(text(&again), text(&answer));
    assert_eq!(again["usage"]["prompt_tokens_details"]["cached_tokens"], 4, "one block of four");
}

#[tokio::test(flavor = "multi_thread")]
async fn all_prompt_forms_and_several_prompts() {
    let worker = Worker::monolithic(small()).await;
    let one = worker.greedy(&[104, 105], 6).await;
    let two = worker.greedy(&[104, 105, 33], 6).await;
    let body = |prompt: Value| json!({"model": MODEL, "prompt": prompt, "max_tokens": 6, "ignore_eos": true, "n": 2});
    for prompts in [json!(["hi", "hi!"]), json!([[104, 105], [104, 105, 33]])] {
        let answer = worker.ask("/v1/completions", &body(prompts)).await;
        let texts: Vec<_> = answer["choices"].as_array().unwrap().iter().map(|c| c["text"].as_str().unwrap()).collect();
        assert_eq!(texts, [&one, &one, &two, &two], "greedy answers to one prompt are equal");
        let indices: Vec<_> =
            answer["choices"].as_array().unwrap().iter().map(|c| c["index"].as_u64().unwrap()).collect();
        assert_eq!(indices, [0, 1, 2, 3]);
        assert_eq!(answer["usage"]["prompt_tokens"], 5);
        assert_eq!(answer["usage"]["completion_tokens"], 24);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_seed_fixes_the_answer_and_each_choice_has_its_own() {
    let worker = Worker::monolithic(small()).await;
    let body = |seed: u32| json!({"model": MODEL, "prompt": "hi", "max_tokens": 32, "ignore_eos": true, "temperature": 1.0, "seed": seed, "n": 2});
    let texts = async |seed| {
        let answer = worker.ask("/v1/completions", &body(seed)).await;
        [0, 1].map(|choice| answer["choices"][choice]["text"].as_str().unwrap().to_owned())
    };
    let first = texts(1).await;
    assert_eq!(first, texts(1).await);
    assert_ne!(first[0], first[1]);
    assert_ne!(first, texts(2).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn stop_strings_end_the_answer_wherever_they_lie() {
    let worker = Worker::monolithic(small()).await;
    let whole = worker.greedy(&[1, 2, 3], 60).await;
    for (from, to) in [(0, 1), (5, 6), (10, 14), (30, 37)] {
        let stop = &whole[from..to];
        let end = whole.find(stop).expect("it is there");
        let mut body = greedy(&[1, 2, 3], 60);
        body["stop"] = json!(["\u{1}never", stop]);
        let answer = worker.ask("/v1/completions", &body).await;
        assert_eq!(text(&answer), &whole[..end], "stop {stop:?}");
        assert_eq!(answer["choices"][0]["finish_reason"], "stop");
        assert_eq!(answer["choices"][0]["stop_reason"], stop);
        body["include_stop_str_in_output"] = json!(true);
        assert_eq!(text(&worker.ask("/v1/completions", &body).await), &whole[..end + stop.len()], "stop {stop:?}");
        body["stream"] = json!(true);
        let events = worker.stream("/v1/completions", &body).await;
        let streamed: String = events.iter().map(|e| e["choices"][0]["text"].as_str().unwrap()).collect();
        assert_eq!(streamed, &whole[..end + stop.len()], "stop {stop:?}");
    }
    let mut body = greedy(&[1, 2, 3], 60);
    body["stop_token_ids"] = json!([u32::from(whole.as_bytes()[3])]);
    body["min_tokens"] = json!(20);
    let late = worker.ask("/v1/completions", &body).await;
    assert!(late["usage"]["completion_tokens"].as_u64().unwrap() >= 20, "min_tokens come first");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_ends_by_itself_unless_told_not_to() {
    let worker = Worker::monolithic(small()).await;
    let mut ended = 0;
    for salt in 0..12 {
        let mut body = greedy(&prompt(9, salt), 400);
        body["ignore_eos"] = json!(false);
        let answer = worker.ask("/v1/completions", &body).await;
        let used = answer["usage"]["completion_tokens"].as_u64().unwrap();
        if answer["choices"][0]["finish_reason"] == "stop" {
            ended += 1;
            assert_eq!(answer["choices"][0]["stop_reason"], Value::Null);
            assert_eq!(text(&answer).len() as u64, used - 1, "the end is a token but no text");
            body["min_tokens"] = json!(used + 1);
            assert!(worker.ask("/v1/completions", &body).await["usage"]["completion_tokens"].as_u64().unwrap() > used);
        }
    }
    assert!(ended > 0, "none of twelve long answers ended by itself");
}

/// What a stream says, put together, is what the whole answer says.
#[tokio::test(flavor = "multi_thread")]
async fn a_stream_equals_the_whole_answer() {
    let worker = Worker::monolithic(small()).await;
    let bodies = [
        ("/v1/completions", json!({"prompt": "stream", "n": 2, "logprobs": 2, "return_token_ids": true})),
        ("/v1/completions", json!({"prompt": ["a", "bc"], "echo": true, "logprobs": 1})),
        ("/v1/completions", json!({"prompt": "s", "temperature": 1.0, "seed": 3, "stop": ["e", "a "]})),
        ("/v1/chat/completions", json!({"messages": [{"role": "user", "content": "hi"}], "n": 2})),
        (
            "/v1/chat/completions",
            json!({"messages": [{"role": "user", "content": "hi"}], "logprobs": true, "top_logprobs": 3}),
        ),
    ];
    for (path, extra) in bodies {
        let mut body = json!({"model": MODEL, "max_tokens": 24});
        body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        let whole = worker.ask(path, &body).await;
        body["stream"] = json!(true);
        body["stream_options"] = json!({"include_usage": true});
        let mut events = worker.stream(path, &body).await;
        let usage = events.pop().unwrap();
        assert_eq!(usage["choices"], json!([]));
        for key in ["prompt_tokens", "completion_tokens", "total_tokens"] {
            assert_eq!(usage["usage"][key], whole["usage"][key], "{body}");
        }
        for choice in whole["choices"].as_array().unwrap() {
            let chunks = events.iter().map(|e| &e["choices"][0]).filter(|c| c["index"] == choice["index"]);
            let chunks: Vec<&Value> = chunks.collect();
            let of = |c: &&Value| c["text"].as_str().or_else(|| c["delta"]["content"].as_str()).unwrap().to_owned();
            let streamed: String = chunks.iter().map(of).collect();
            let want = choice["text"].as_str().or_else(|| choice["message"]["content"].as_str()).unwrap();
            assert_eq!(streamed, want, "{body}");
            assert_eq!(chunks.last().unwrap()["finish_reason"], choice["finish_reason"], "{body}");
            assert_eq!(chunks.last().unwrap()["stop_reason"], choice["stop_reason"], "{body}");
            assert!(chunks[..chunks.len() - 1].iter().all(|c| c["finish_reason"].is_null()), "{body}");
            for key in ["tokens", "token_logprobs", "top_logprobs", "text_offset", "content"] {
                let Some(want) = choice["logprobs"].get(key).and_then(Value::as_array) else { continue };
                let lists = chunks.iter().filter_map(|c| c["logprobs"].get(key).and_then(Value::as_array));
                let streamed: Vec<_> = lists.flatten().cloned().collect();
                assert_eq!(&streamed, want, "{key} of {body}");
            }
            if let Some(want) = choice["token_ids"].as_array() {
                let ids = chunks.iter().filter_map(|c| c["token_ids"].as_array()).flatten().cloned();
                assert_eq!(&ids.collect::<Vec<_>>(), want, "{body}");
            }
        }
        if path.contains("chat") {
            assert_eq!(events[0]["choices"][0]["delta"]["role"], "assistant");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn chat_is_a_completion_of_its_template() {
    let worker = Worker::monolithic(small()).await;
    let messages =
        json!([{"role": "system", "content": "s"}, {"role": "user", "content": [{"type": "text", "text": "hi"}]}]);
    let tokens = worker.ask("/tokenize", &json!({"model": MODEL, "messages": messages})).await;
    assert_eq!(tokens["count"], tokens["tokens"].as_array().unwrap().len());
    let prompt: Vec<u32> = serde_json::from_value(tokens["tokens"].clone()).unwrap();
    let want = worker.greedy(&prompt, 12).await;
    let mut body =
        json!({"model": MODEL, "messages": messages, "max_completion_tokens": 12, "ignore_eos": true, "max_tokens": 1});
    let chat = worker.ask("/v1/chat/completions", &body).await;
    assert_eq!(chat["object"], "chat.completion");
    assert_eq!(chat["choices"][0]["message"], json!({"role": "assistant", "content": want, "tool_calls": []}));
    body["messages"] = json!([{"role": "user", "content": "something else"}]);
    body["tokens"] = json!(prompt);
    for path in ["/v1/chat/completions/tokens", "/chat/completions/tokens"] {
        let chat = worker.ask(path, &body).await;
        assert_eq!(chat["choices"][0]["message"]["content"], json!(want), "tokens replace the prompt");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn prompt_logprobs_and_echo() {
    let worker = Worker::monolithic(small()).await;
    let body =
        json!({"model": MODEL, "prompt": "abc", "max_tokens": 2, "echo": true, "logprobs": 1, "prompt_logprobs": 0});
    let answer = worker.ask("/v1/completions", &body).await;
    let choice = &answer["choices"][0];
    assert!(choice["text"].as_str().unwrap().starts_with("abc"));
    assert_eq!(choice["logprobs"]["token_logprobs"][0], Value::Null);
    assert_eq!(choice["logprobs"]["text_offset"], json!([0, 1, 2, 3, 4]));
    let prompt = choice["prompt_logprobs"].as_array().unwrap();
    assert_eq!((prompt.len(), &prompt[0]), (3, &Value::Null));
    assert!(prompt[1]["98"]["logprob"].is_number());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_other_routes_answer() {
    let worker = Worker::monolithic(small()).await;
    let models: Value = worker.get("/v1/models").await.json().await.unwrap();
    assert_eq!((&models["data"][0]["id"], &models["data"][0]["max_model_len"]), (&json!(MODEL), &json!(1024)));
    for path in ["/health", "/ping", "/version", "/load", "/metrics"] {
        assert_eq!(worker.get(path).await.status(), StatusCode::OK, "{path}");
    }
    assert_eq!(worker.post("/ping", &json!({})).await.status(), StatusCode::OK);
    let tokens = worker.ask("/tokenize", &json!({"prompt": "né"})).await;
    assert_eq!(tokens, json!({"count": 3, "max_model_len": 1024, "tokens": [110, 195, 169], "token_strs": null}));
    let text = worker.ask("/detokenize", &json!({"model": MODEL, "tokens": [110, 195, 169]})).await;
    assert_eq!(text, json!({"prompt": "né"}));
    assert_eq!(worker.ask("/reset_prefix_cache", &json!({})).await, json!({"success": true}));
    assert_eq!(worker.ask("/abort_requests", &json!({})).await, json!({"status": "aborted", "aborted": 0}));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_keeps_its_clients_name() {
    let worker = Worker::monolithic(small()).await;
    let post = |body: Value| worker.client.post(format!("{}/v1/completions", worker.url)).json(&body);
    let response = post(greedy(&[1], 1)).header("X-Request-Id", "mine").send().await.unwrap();
    assert_eq!(response.headers()["x-request-id"], "mine");
    assert_eq!(response.json::<Value>().await.unwrap()["id"], "cmpl-mine");
    let mut named = greedy(&[1], 1);
    named["request_id"] = json!("body");
    let response = post(named.clone()).send().await.unwrap();
    assert_eq!(response.headers()["x-request-id"], "body");
    let response = post(named).header("X-Request-Id", "header").send().await.unwrap();
    assert_eq!(response.json::<Value>().await.unwrap()["id"], "cmpl-header", "the header wins");
    let response = post(json!({})).header("X-Request-Id", "mine").send().await.unwrap();
    assert_eq!((response.status().as_u16(), &response.headers()["x-request-id"]), (400, &"mine".parse().unwrap()));
    let response = worker.get("/health").await;
    assert_eq!(response.headers()["x-request-id"].len(), 32);
}

#[tokio::test(flavor = "multi_thread")]
async fn at_its_bound_a_worker_says_when_to_come_back() {
    let mut config = small();
    config.requests_max = 2;
    config.decode_us_per_token = 20_000.0;
    let worker = Worker::monolithic(config).await;
    let mut body = greedy(&[1], 1000);
    body["n"] = json!(2);
    body["stream"] = json!(true);
    let running = worker.post("/v1/completions", &body).await;
    let refused = worker.post("/v1/completions", &greedy(&[1], 1)).await;
    assert_eq!(refused.status(), StatusCode::TOO_MANY_REQUESTS);
    assert_eq!(refused.headers()["retry-after"], "1");
    body["n"] = json!(3);
    assert_eq!(worker.post("/v1/completions", &body).await.status(), StatusCode::BAD_REQUEST);
    drop(running);
    worker.until_at_rest().await;
    worker.greedy(&[1], 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_are_ended_by_name() {
    let mut config = small();
    config.decode_us_per_token = 20_000.0;
    let worker = Worker::monolithic(config).await;
    let mut body = greedy(&[1], 1000);
    body["request_id"] = json!("long");
    let (answer, ended) = tokio::join!(worker.ask("/v1/completions", &body), async {
        worker.until("pdlink_engine_requests_running", 1).await;
        worker.ask("/abort_requests", &json!({"request_ids": ["long"]})).await
    });
    assert_eq!(answer["choices"][0]["finish_reason"], "abort");
    assert_eq!(ended["aborted"], 1);
    worker.until_at_rest().await;
}

/// KV-9: whenever a client leaves, its blocks are free soon.
#[tokio::test(flavor = "multi_thread")]
async fn clients_that_leave_at_any_moment_leave_nothing_behind() {
    let mut config = small();
    config.decode_us_per_token = 300.0;
    config.prefill_us_per_token = 20.0;
    config.num_blocks = 64;
    let worker = Worker::monolithic(config).await;
    for round in 0..40_u64 {
        let mut body = greedy(&prompt(50, 1), 150);
        body["stream"] = json!(round % 2 == 0);
        let request = worker.client.post(format!("{}/v1/completions", worker.url)).json(&body).send();
        let leave = tokio::time::timeout(std::time::Duration::from_micros(round * 701), async {
            let response = request.await.unwrap();
            response.text().await.unwrap()
        });
        let _ = leave.await;
    }
    worker.until_at_rest().await;
    assert_eq!(worker.ask("/reset_prefix_cache", &json!({})).await["success"], true);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_drains_ends_what_it_began() {
    let mut config = small();
    config.decode_us_per_token = 2_000.0;
    let worker = Worker::monolithic(config).await;
    let (client, url) = (worker.client.clone(), worker.url.clone());
    let ask = async move {
        let response = client.post(format!("{url}/v1/completions")).json(&greedy(&[1], 200)).send().await.unwrap();
        response.json::<Value>().await.unwrap()
    };
    let running = async {
        worker.until("pdlink_engine_requests_running", 1).await;
        worker.stop().await
    };
    let (answer, drained) = tokio::join!(ask, running);
    assert_eq!(answer["usage"]["completion_tokens"], 200);
    assert!(drained);
}
