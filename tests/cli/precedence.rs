//! Flag, environment, profile, configuration file, default: who wins is seen by the repository that is
//! looked for.

use support::s3;

use crate::{Home, ran};

#[tokio::test(flavor = "multi_thread")]
async fn the_first_place_that_says_something_wins() {
    let server = s3::start(s3::Options::default()).await.unwrap();
    let home = Home::new();
    let at = |prefix: &str| format!("s3://{}/{prefix}", server.options().bucket);
    let config = format!(
        "s3-endpoint = '{}'\ns3-region = '{}'\nrepo = '{}'\n[profile.prod]\nrepo = '{}'\n",
        server.endpoint(),
        server.options().region,
        at("of-file"),
        at("of-profile"),
    );
    home.write(".gs_pitr/config.toml", &config);
    let looked_for = |profile: bool, environment: bool, flag: bool| {
        let mut command = home.command(&["show", "--output", "json"]);
        command.env("AWS_ACCESS_KEY_ID", &server.options().access_key);
        command.env("AWS_SECRET_ACCESS_KEY", &server.options().secret_key);
        if profile {
            command.args(["--profile", "prod"]);
        }
        if environment {
            command.env("GS_PITR_REPO", at("of-environment"));
        }
        if flag {
            command.args(["--repo", &at("of-flag")]);
        }
        let (code, kind, message) = ran(&mut command).error();
        assert_eq!((code, kind.as_str()), (8, "not-found"), "{message}");
        message
    };
    for (profile, environment, flag, expected) in [
        (false, false, false, "of-file"),
        (true, false, false, "of-profile"),
        (true, true, false, "of-environment"),
        (true, true, true, "of-flag"),
    ] {
        let message = looked_for(profile, environment, flag);
        assert!(message.contains(expected), "{expected}: {message}");
    }
}
