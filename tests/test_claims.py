"""What mopefuse promises: for each claim, the tests that hold it in the quick tier, and those that only the full tier adds."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

TIERS = {"process", "matrix", "soak"}  # markers of tests that `make test` leaves out
# For each claim: "quick", its tests in `make test`; "full", further tests that only `make test-all` runs.
CLAIMS: dict[str, dict[str, str]] = {
    "prompts as keys and values equal inserted tokens, in every encoder": {
        "quick": "test_encoders::test_keys_and_values_equal_inserted_tokens "
        "test_prompts::test_prompts_match_the_definition "
        "test_windows::test_it_equals_attention_with_the_prompt_in_every_window",
        "full": "test_encoders::test_the_families_that_support_inserted_tokens_are_as_documented",
    },
    "prompts can be mapped from tokens, of which psi is the limit, and padding has no effect": {
        "quick": "test_token_conditions::test_one_token_equal_to_psi_is_the_pooled_condition "
        "test_token_conditions::test_padding_has_no_effect "
        "test_token_conditions::test_a_sample_does_not_depend_on_its_batch "
        "test_token_conditions::test_a_run_with_cached_tokens_takes_the_course_of_one_without",
    },
    "the routing of a sample does not saturate before the experts differ": {
        "quick": "test_router_rate::test_the_routing_of_a_sample_does_not_saturate_in_the_first_steps",
    },
    "without prompts the backbone is unmodified, bit for bit": {
        "quick": "test_encoders::test_without_prompts_the_backbone_is_unmodified "
        "test_fusion::test_zero_gated_prompts_start_as_the_frozen_encoder_bit_for_bit",
    },
    "every encoder satisfies the contract": {
        "quick": "test_encoders::test_every_family_satisfies_the_contract "
        "test_lora::test_an_adapted_encoder_satisfies_the_contract",
        "full": "test_image_sizes::test_inspect_and_training_use_the_declared_size "
        "test_image_sizes::test_the_size_option_overrides_the_size_of_timm_models",
    },
    "a prediction does not depend on the rest of its batch": {
        "quick": "test_fusion::test_a_sample_does_not_depend_on_its_batch "
        "test_tuned::test_a_sample_does_not_depend_on_its_batch "
        "test_pmf::test_a_sample_does_not_depend_on_its_batch_and_is_deterministic",
    },
    "threads can share a model": {
        "quick": "test_threads::test_threads_can_share_an_encoder test_threads::test_threads_can_share_a_model "
        "test_threads::test_threads_can_share_a_loaded_model",
    },
    "exactly the declared parameters are trained, saved and exported": {
        "quick": "test_fusion::test_exactly_these_parameters_are_trained_and_saved "
        "test_tuned::test_exactly_the_trainable_parameters_are_trained",
        "full": "test_method_sizes::test_trainable_parameters_match_the_definition_for_vit_and_bert "
        "test_lora::test_trainable_parameters_match_the_definition_for_vit_b_and_bert_base",
    },
    "a model is saved, copied and converted as a torch module": {
        "quick": "test_converted::test_what_was_loaded_prepares_and_learns_as_before "
        "test_converted::test_every_method_can_be_converted",
        "full": "test_converted::test_every_method_is_saved_whole test_converted::test_every_encoder_is_saved_whole "
        "test_converted::test_methods_that_read_images_among_words_can_be_saved_and_converted "
        "test_api::test_the_command_line_accepts_a_saved_model",
    },
    "half precision and recomputed activations change results by no more than rounding": {
        "quick": "test_autocast::test_every_method_runs_in_half_precision "
        "test_recompute::test_gradients_are_equal_bit_for_bit",
    },
    "a compiled model is one graph with the same results": {
        "quick": "test_compile::test_a_model_in_training_compiles_to_one_graph_with_the_same_results",
        "full": "test_compile::test_a_compiled_run_learns_the_same_as_an_uncompiled_one "
        "test_compile::test_steps_are_compiled_once_for_each_batch_shape "
        "test_prefix_cache::test_a_compiled_run_equals_an_uncompiled_one",
    },
    "a resumed run equals an uninterrupted one, bit for bit": {
        "quick": "test_train::test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit "
        "test_missing::test_a_resumed_run_with_dropout_equals_an_uninterrupted_one",
        "full": "test_fit::test_a_fit_that_was_stopped_continues "
        "test_warm_start::test_training_continues_from_the_baseline_with_the_lowest_loss_also_when_resumed "
        "test_inserting::test_a_run_can_be_evaluated_and_exported "
        "test_train::test_a_run_killed_at_random_moments_and_resumed_is_equal_bit_for_bit "
        "test_kills::test_a_run_killed_before_it_exists_can_be_started_again",
    },
    "the same seed gives the same run with any number of workers": {
        "quick": "test_train::test_the_number_of_workers_does_not_affect_the_result "
        "test_fusion::test_the_same_seed_gives_the_same_model_regardless_of_random_state",
    },
    "a signal stops a run after its step, with a checkpoint and the exit code of the signal": {
        "quick": "test_terminal::test_a_stopped_run_prints_the_resume_command_and_resumes "
        "test_train::test_ctrl_c_during_the_final_test_loses_nothing",
        "full": "test_train::test_a_group_signal_does_not_kill_the_data_workers "
        "test_plugins::test_a_plugin_that_hangs_is_stopped_by_ctrl_c",
    },
    "SIGKILL leaves no half-written file, and the next call succeeds": {
        "quick": "test_kills::test_a_killed_export_leaves_no_partial_files "
        "test_kills::test_a_killed_predict_leaves_no_partial_file "
        "test_kills::test_a_killed_process_leaves_no_partial_cache_entry "
        "test_checkpoint::test_a_kill_while_publishing_leaves_the_earlier_folder",
        "full": "test_kills::test_a_killed_export_over_an_earlier_one_keeps_or_restores_it "
        "test_kills::test_a_killed_report_leaves_no_partial_page "
        "test_kills::test_a_killed_data_prepare_leaves_no_partial_data_set "
        "test_kills::test_a_killed_data_make_leaves_no_partial_data_set test_kills::test_a_killed_study_continues "
        "test_checkpoint::test_a_kill_at_any_moment_of_a_save_loop_leaves_the_latest_checkpoint_complete",
    },
    "only one process writes to a run": {
        "quick": "test_run::test_every_writing_method_respects_the_lock_of_a_running_process "
        "test_run::test_only_one_of_several_processes_takes_over_a_stale_lock",
        "full": "test_kills::test_only_one_of_two_processes_trains_a_run",
    },
    "cached values equal computed ones, with any number of processes": {
        "quick": "test_data_cache::test_cached_features_and_images_give_the_same_results "
        "test_feature_store::test_two_processes_that_compute_the_same_feature_use_the_first_published "
        "test_feature_store::test_ranks_compute_each_sample_once_and_use_the_same_values",
        "full": "test_feature_store::test_ranks_without_a_common_cache_use_the_same_values "
        "test_feature_store::test_concurrent_processes_agree_bit_for_bit "
        "test_feature_store::test_a_killed_process_leaves_its_published_shards_and_no_partial_files "
        "test_feature_store::test_a_million_samples_are_looked_up_in_little_memory "
        "test_kills::test_several_processes_share_a_cache_while_some_are_killed",
    },
    "training starts at the first prompted layer, with the results of the whole model": {
        "quick": "test_prefix_cache::test_a_run_with_the_cache_equals_one_without_it "
        "test_prefix_cache::test_early_layers_run_once_for_each_sample_and_not_in_training "
        "test_prefix_cache::test_a_resumed_run_is_equal_bit_for_bit",
        "full": "test_prefix_cache::test_two_processes_equal_one "
        "test_token_conditions::test_two_processes_equal_one",
    },
    "several processes give the same results as one": {
        "quick": "test_distributed::test_two_processes_equal_one test_predict::test_several_processes_write_the_same_file",
        "full": "test_distributed::test_only_the_main_process_prints test_mlp::test_two_processes_train_like_one "
        "test_segmentation::test_two_processes_equal_one "
        "test_bad_data::test_a_split_smaller_than_the_processes_is_evaluated_exactly "
        "test_distributed::test_other_processes_wait_as_long_as_the_main_process_lives "
        "test_distributed::test_a_slower_process_is_waited_for",
    },
    "evaluation is deterministic and equals the metrics of training": {
        "quick": "test_cli::test_eval_is_deterministic_and_equals_the_metrics_of_training",
        "full": "test_scale::test_the_memory_of_evaluation_does_not_grow_with_rows_times_labels",
    },
    "no archive runs code, reads outside its folder or fills the memory": {
        "quick": "test_pt2::test_a_hostile_archive_is_refused_and_runs_no_code "
        "test_pt2::test_torch_alone_would_run_the_code_of_hostile_archives "
        "test_artefacts::test_F_73_a_pickle_in_place_of_weights_runs_nothing "
        "test_artefacts::test_F_76_no_file_outside_the_artefact_is_opened test_layers::test_nothing_loads_pickles",
        "full": "test_pt2::test_a_changed_archive_loads_or_is_refused test_pt2::test_threads_can_load_archives_concurrently",
    },
    "a damaged or different artefact is detected and named": {
        "quick": "test_artefacts::test_F_75_a_flipped_bit_in_the_weights_is_detected "
        "test_export::test_a_changed_file_is_named",
        "full": "test_encoder_description::test_a_run_is_not_loaded_with_a_different_encoder",
    },
    "nothing outside the data root is read, and images are decoded safely": {
        "quick": "test_images::test_a_path_outside_the_root_is_refused_and_nothing_is_opened "
        "test_images::test_an_image_with_too_many_pixels_is_refused_by_its_header",
    },
    "an error is one line with a fix and the exit code of its family": {
        "quick": "test_cli::test_a_process_ends_with_the_exit_code_of_its_error "
        "test_cli::test_an_error_is_one_line_with_what_where_and_fix "
        "test_memory_limits::test_running_out_of_memory_gives_exit_code_7",
        "full": "test_memory_limits::test_a_process_with_little_address_space_ends_with_one_line "
        "test_artefacts::test_F_72_a_torchvision_that_does_not_match_torch_is_reported_with_both_versions "
        "test_written::test_a_full_disk_is_an_error_with_a_fix_that_fits_the_command",
    },
    "bad data and doubtful labels are reported with their rows": {
        "quick": "test_cli::test_bad_data_is_an_error_that_lists_every_line "
        "test_label_check::test_a_column_of_lists_is_refused_without_its_flag_and_read_with_it",
    },
    "an ONNX or pt2 bundle predicts like the model": {
        "quick": "test_export::test_a_bundle_predicts_like_its_run",
        "full": "test_defaults::test_a_bundle_of_the_default_stack_predicts_as_the_run "
        "test_export::test_a_graph_with_different_outputs_is_not_published "
        "test_export::test_a_multi_label_bundle_keeps_the_thresholds_of_the_run "
        "test_lora::test_an_export_predicts_like_the_run test_pmf::test_a_run_can_be_evaluated_and_exported "
        "test_linear::test_the_exported_graph_predicts_the_same "
        "test_mlp::test_the_exported_graph_predicts_the_same "
        "test_cross_attention::test_the_exported_graph_predicts_the_same "
        "test_cross_attention::test_the_exported_graph_masks_padding "
        "test_several::test_a_run_with_several_encoders_can_be_exported_and_reported "
        "test_head_tokens::test_a_run_that_starts_there_is_an_ordinary_run "
        "test_values_shown::test_an_export_speaks_of_values test_values::test_an_export_predicts_the_values_of_the_run "
        "test_segmentation::test_a_bundle_has_the_metrics_of_its_run_and_an_encoder_can_be_swapped "
        "test_export::test_a_bundle_that_tokenizes_differently_is_not_published "
        "test_export::test_int8_weights_are_smaller_and_measured_before_and_after "
        "test_export::TestWeightsBesideTheGraph::test_they_must_be_complete_and_inside_the_folder "
        "test_graph::test_onnx_predicts_like_the_model "
        "test_mlp::test_a_run_can_be_evaluated_exported_and_reported "
        "test_cross_attention::test_a_run_can_be_evaluated_exported_and_reported "
        "test_token_conditions::test_a_bundle_predicts_as_the_run_does "
        "test_map::test_the_exported_graph_predicts_the_same_with_and_without_values "
        "test_map::test_it_is_evaluated_without_values_and_reported "
        "test_maple::test_it_is_an_ordinary_run_and_exports "
        "test_flamingo::test_the_exported_graph_predicts_the_same "
        "test_flamingo::test_it_is_evaluated_exported_and_reported_as_any_run "
        "test_qmf::test_the_exported_graph_predicts_the_same "
        "test_qmf::test_it_is_evaluated_exported_and_reported_as_any_run",
    },
    "a bundle needs no torch": {
        "quick": "test_predictor::test_the_runtime_imports_no_torch test_predictor::test_tokens_equal_those_of_the_encoder",
        "full": "test_cli::test_a_run_imports_no_library_that_its_encoders_do_not_need "
        "test_predictor::test_a_bundle_predicts_without_torch "
        "test_written::test_without_torch_loading_a_run_is_an_error_with_the_package_to_install",
    },
    "an encoder can be swapped, and weights that do not depend on it are kept": {
        "quick": "test_swap::test_if_nothing_is_swapped_everything_is_kept "
        "test_swap::test_a_new_complementary_encoder_keeps_prompts_experts_and_head "
        "test_swap::test_a_killed_swapped_run_resumes_to_the_same_result "
        "test_swap::test_tuning_is_compared_with_training_from_scratch",
        "full": "test_swap_learning::test_after_swapping_the_text_encoder_a_run_reaches_the_final_accuracy_of_scratch_sooner "
        "test_swap::test_two_processes_swap_tune_and_compare_like_one",
    },
    "a command does its work if its standard streams are closed": {
        "quick": "test_standard_streams::test_training_finishes_with_closed_streams "
        "test_standard_streams::test_a_result_that_cannot_be_printed_is_an_error",
        "full": "test_written::test_every_file_follows_the_umask "
        "test_standard_streams::test_a_study_finishes_with_closed_streams",
    },
    "a study gives the same table despite interruptions": {
        "quick": "test_study::test_finished_cells_are_not_repeated_and_added_ones_are_run",
        "full": "test_study::test_a_cell_terminated_from_outside_is_recorded_as_failed "
        "test_study::test_a_failed_cell_is_recorded_and_the_others_continue "
        "test_room::test_a_study_runs_one_cell_at_a_time_if_memory_is_short "
        "test_study::test_a_finished_cell_of_every_kind_of_method_counts_as_finished "
        "test_study::test_a_study_killed_at_random_and_restarted_gives_the_same_table "
        "test_study::test_a_cell_whose_process_is_killed_is_recorded_and_the_others_continue "
        "test_study::test_a_stop_signal_saves_running_cells_and_leaves_no_process "
        "test_study::test_notices_of_cells_are_shown_once",
    },
    "a search proposes the same trials as Optuna and never uses the test split": {
        "quick": "test_search::test_repeated_settings_are_one_run_and_a_failed_one_stays_failed",
        "full": "test_search::test_trials_of_one_batch_are_the_same_for_any_number_of_jobs "
        "test_search::test_the_validation_split_affects_the_search "
        "test_search::test_a_killed_and_restarted_search_gives_the_same_result "
        "test_search::test_trials_are_those_that_optuna_proposes_for_these_values "
        "test_search::test_the_test_split_does_not_affect_the_search "
        "test_search::test_every_trial_is_an_ordinary_run_with_its_settings "
        "test_search::test_finished_trials_are_not_repeated_and_more_trials_continue_the_search "
        "test_search::test_the_table_marks_the_best_trial_and_prints_a_working_command "
        "test_search::test_compare_shows_the_trials_and_warns_against_selecting_by_test_results "
        "test_search::test_a_metric_that_the_data_do_not_have_is_refused",
    },
    "rows may lack a modality if the model was trained for that": {
        "quick": "test_missing_eval::test_predict_handles_rows_with_gaps_if_the_model_was_trained_to "
        "test_missing_values::test_a_missing_value_is_handled_by_the_policy",
        "full": "test_missing_eval::test_a_grid_has_a_table_and_a_section_in_the_report "
        "test_missing_eval::test_bundles_predict_rows_with_gaps_like_their_run "
        "test_missing_eval::test_another_seed_or_checkpoint_does_not_overwrite_saved_results",
    },
    "a plugin adds an encoder, a method, a modality or data, and a broken one affects nothing else": {
        "quick": "test_plugin_docs::test_the_method_and_the_promptable_encoder_train_and_can_be_swapped "
        "test_new_plugin::test_a_new_plugin_trains_as_either_encoder",
        "full": "test_plugins::test_listing_imports_no_plugin "
        "test_plugin_docs::test_the_nine_line_plugin_installs_and_satisfies_the_contract "
        "test_artefact_versions::test_F_107_a_run_records_its_plugins_and_cannot_be_loaded_without_them "
        "test_new_plugin::test_a_new_plugin_passes_its_own_test_and_can_be_inspected "
        "test_new_plugin::test_the_contract_test_of_a_new_plugin_can_fail "
        "test_new_plugin::test_public_names_exist_and_are_imported_lazily "
        "test_plugins::test_the_list_shows_what_each_entry_point_resolves_to",
    },
    "a model can be uploaded to the Hugging Face Hub and loaded from it": {
        "quick": "test_push::test_only_the_adapter_is_sent_in_one_commit "
        "test_push::test_an_unreachable_hub_is_explained",
        "full": "test_push::test_another_machine_gets_the_same_predictions_also_offline "
        "test_written::test_a_dry_run_of_push_works_without_a_network",
    },
    "bench measures what it reports": {
        "quick": "test_bench::test_inserted_tokens_equal_keys_and_values "
        "test_bench::test_a_benchmark_step_equals_a_training_step",
        "full": "test_bench::test_the_command_prints_one_object_with_both_ratios "
        "test_bench::test_every_row_has_every_number "
        "test_bench::test_parameters_and_bytes_are_those_that_a_run_trains_and_saves "
        "test_bench::test_scaling_is_measured_along_every_axis "
        "test_device::test_denormal_numbers_are_flushed_on_request "
        "test_bench::test_a_failed_or_killed_process_is_an_error "
        "test_bench::test_start_up_is_timed_for_help_version_and_errors test_bench::test_a_batch_is_divided_among_processes "
        "test_bench::test_memory_is_the_peak_of_a_call "
        "test_bench::test_with_train_or_infer_alone_only_that_is_measured",
    },
    "every command and Python block in the documentation runs": {
        "quick": "test_readme::test_the_five_minutes_start_with_the_data_check_and_the_simplest_baseline",
        "full": "test_readme::test_every_command_and_every_piece_of_python_runs "
        "test_docs::test_every_command_and_python_block_of_a_page_runs "
        "test_docs::test_the_notebook_runs_from_top_to_bottom test_docs::test_the_site_builds_without_a_warning",
    },
    "every recipe runs": {
        "quick": "test_recipes::test_two_steps_run_on_tiny_encoders_and_data",
    },
    "no text from data controls the terminal or a page": {
        "quick": "test_escapes::test_predict_escapes_hostile_text "
        "test_report::test_hostile_labels_texts_and_ids_are_shown_as_text",
    },
    "a server answers every request that it accepted, whatever dies or ends meanwhile": {
        "quick": "test_serve_batching::test_a_batch_whose_worker_dies_is_computed_again "
        "test_serve_batching::test_only_the_request_that_kills_workers_is_given_up",
        "full": "test_serve_batching::test_a_worker_that_hangs_is_restarted test_serve::test_a_killed_worker_loses_no_request "
        "test_serve::test_a_request_that_kills_workers_is_answered_and_the_others_as_well "
        "test_serve::test_a_worker_out_of_memory_is_503_and_goes_on "
        "test_serve::test_a_server_whose_workers_cannot_load_ends_with_the_reason "
        "test_serve::test_a_signal_under_load_loses_no_accepted_request "
        "test_serve::test_a_signal_to_all_processes_lets_accepted_requests_finish "
        "test_serve::test_the_end_is_not_put_off_for_ever "
        "test_serve::test_workers_end_with_a_server_that_is_killed",
    },
    "a client that misbehaves gets an error, and affects no other": {
        "quick": "test_serve_http::test_a_wrong_body_is_explained test_serve_http::test_a_missing_or_wrong_key_is_refused "
        "test_serve_http::test_a_body_is_limited_whether_it_is_announced_or_not "
        "test_serve_batching::test_a_full_queue_refuses_and_says_when_to_come_back",
        "full": "test_serve::test_a_client_that_stalls_is_disconnected test_serve::test_a_body_that_trickles_is_given_up "
        "test_serve::test_endless_headers_are_cut_off "
        "test_serve::test_a_body_that_is_too_large_is_refused_before_it_was_sent "
        "test_serve::test_a_body_that_was_refused_is_not_read_for_ever "
        "test_serve::test_requests_of_clients_that_left_are_not_computed "
        "test_serve::test_ten_thousand_rows_at_once_are_answered_or_refused "
        "test_serve::test_connections_are_limited_if_asked "
        "test_serve::test_an_image_with_too_many_pixels_or_of_no_format_is_refused",
    },
    "requests of many clients share batches, and a single client does not wait": {
        "quick": "test_serve_batching::test_a_batch_starts_when_it_is_full "
        "test_serve_batching::test_nothing_waits_for_connections_that_do_not_exist",
        "full": "test_serve::test_a_single_client_does_not_wait_for_others "
        "test_serve::test_requests_of_several_clients_share_a_batch",
    },
    "many runs with the same encoders answer in one forward pass as each does alone": {
        "quick": "test_shared_pair::test_one_forward_pass_for_many_runs_equals_each_alone",
        "full": "test_shared_pair::test_other_pairs",
    },
    "mopefuse serve predicts what its models predict, and documents itself": {
        "quick": "test_serve_http::test_one_row_is_one_request "
        "test_serve_http::test_every_documented_example_works_and_every_path_is_documented",
        "full": "test_serve::test_predictions_are_those_of_the_models test_serve::test_the_printed_command_works "
        "test_serve::test_an_adapter_can_be_removed_and_added_while_it_is_used "
        "test_serve::test_bundles_are_served_without_torch test_serve::test_a_port_in_use_is_an_error "
        "test_serve::test_a_server_cannot_be_started_with_nothing_or_nonsense test_serve::test_a_missing_package_is_named "
        "test_serve::test_the_documentation_works_in_a_browser",
    },
    "a client predicts with a server as with the loaded model": {
        "quick": "test_client::test_predictions_are_those_of_the_loaded_model "
        "test_client::test_threads_can_share_a_client "
        "test_client_retries::test_a_busy_server_is_asked_again_when_it_says",
        "full": "test_client::test_a_client_predicts_with_mopefuse_serve",
    },
    "the page of a server shows what its models predict": {
        "quick": "test_try_page::test_the_page_shows_the_prediction_of_the_model "
        "test_try_page::test_errors_are_shown_as_the_server_words_them "
        "test_try_page::test_swagger_ui_sends_a_request",
    },
    "Ray Serve answers like one server, and loses no request if a replica dies": {
        "quick": "test_serve_ray::test_a_call_is_sent_again_if_its_replica_died "
        "test_serve_ray::test_a_call_that_kills_replicas_is_given_up "
        "test_serve_ray::test_a_full_queue_refuses_the_request",
        "full": "test_serve_ray::test_a_killed_replica_loses_no_request_and_is_replaced "
        "test_serve_ray::test_the_interface_is_that_of_the_server_on_one_machine",
    },
    "shards and remote data have the rows, the order and the losses of the folder": {
        "quick": "test_shards::test_shards_have_the_rows_of_the_folder "
        "test_shards::test_the_same_rows_are_held_out_of_shards "
        "test_shards::test_training_on_shards_takes_the_course_of_training_on_the_folder "
        "test_shards::test_a_damaged_image_is_found_in_every_format "
        "test_remote_data::test_an_unreachable_server_is_an_error",
        "full": "test_remote_data::test_training_on_remote_data_takes_the_course_of_training_on_the_folder "
        "test_remote_data::test_data_workers_read_remote_files test_remote_data::test_remote_files_are_fetched_once "
        "test_remote_data::test_a_remote_image_that_changed_is_read_again "
        "test_remote_data::test_a_damaged_image_in_a_remote_shard_is_found "
        "test_remote_data::test_rows_cannot_name_files_outside_the_remote_folder "
        "test_remote_data::test_the_rows_of_remote_data_are_a_data_set_of_torch "
        "test_remote_data::test_remote_data_that_do_not_exist_are_an_error",
    },
    "a batch prediction has every row once, in order and equal to predict, whatever is killed": {
        "quick": "test_batch_predict::test_the_files_of_a_folder_equal_predict_byte_for_byte "
        "test_batch_predict::test_what_was_stopped_continues_where_it_was "
        "test_batch_predict::test_a_damaged_table_is_reported_and_the_others_are_complete",
        "full": "test_batch_engines::test_a_killed_worker_is_replaced_and_a_signal_stops_for_later "
        "test_batch_engines::test_a_killed_actor_of_ray_is_replaced "
        "test_batch_predict::test_rankings_and_masks_equal_those_of_predict "
        "test_batch_predict::test_a_bundle_predicts_many_tables "
        "test_batch_engines::test_tables_images_and_output_can_be_in_s3 test_batch_engines::test_tar_shards_can_be_in_s3",
    },
    "encoders that are sharded over processes give the same results as whole ones": {
        "quick": "test_sharding::test_one_process_says_that_it_cannot_shard "
        "test_sharding::test_what_cannot_be_sharded_is_refused_before_training "
        "test_sharding::test_a_sharded_encoder_equals_a_whole_one",
        "full": "test_sharding::test_sharded_runs_equal_whole_ones "
        "test_decoders::test_a_sharded_quantised_language_model_is_trained_with_as_a_whole_one",
    },
    "several machines give the same results as one, and a run survives the death of any process": {
        "quick": "test_nodes::test_the_same_command_starts_continues_and_repeats_a_run "
        "test_nodes::test_a_job_takes_over_its_own_lock_from_another_machine",
        "full": "test_nodes::test_two_nodes_with_caches_of_their_own_equal_one_process "
        "test_nodes::test_a_run_whose_processes_are_killed_equals_an_undisturbed_one",
    },
    "the files for containers are valid and agree with the server": {
        "quick": "test_deploy::test_its_linter_accepts_it test_deploy::test_every_flag_exists test_deploy::test_ports_agree "
        "test_deploy::test_the_job_that_trains_has_flags_that_exist",
        "full": "test_deploy::test_the_slim_image_serves_bundles_and_ends_on_sigterm",
    },
    "quantised encoders pass gradients on, and are other encoders": {
        "quick": "test_quantize::test_the_restored_weights_are_those_of_torchao "
        "test_quantize::test_gradients_of_prompts_are_close_to_those_with_floating_point "
        "test_quantize::test_every_family_satisfies_the_contract_in_8_bits "
        "test_quantize::test_it_is_another_encoder_in_descriptions_and_caches "
        "test_decoders::test_a_quantised_language_model_is_trained_with_and_loaded_again",
        "full": "test_quantize::test_a_model_with_quantised_encoders_compiles_to_one_graph "
        "test_quantize::test_a_run_is_exported_in_any_form "
        "test_bench::test_quantised_encoders_have_rows_with_the_bytes_of_their_weights",
    },
    "imports only go down": {
        "quick": "test_layers::test_imports_go_down_only",
    },
}


def listed_tests(claim: str, tier: str) -> list[str]:
    return CLAIMS[claim].get(tier, "").split()


def function_of(test: str) -> Any:
    module, *names = test.split("::")
    found: Any = importlib.import_module(module)
    for name in names:
        found = getattr(found, name)
    return found


def marks_of(marked: Any) -> list[pytest.Mark]:
    marks = getattr(marked, "pytestmark", [])
    return list(marks) if isinstance(marks, list) else [marks]


def tier_of(marks: Any) -> set[str]:
    return {mark.name for mark in marks} & TIERS


def has_a_quick_case(test: str) -> bool:
    """Whether `make test` runs the test with at least one of its parameters."""
    module = importlib.import_module(test.partition("::")[0])
    marks = marks_of(module) + marks_of(function_of(test))
    marks += marks_of(function_of(test.rpartition("::")[0])) if test.count("::") == 2 else []
    lists = [mark.args[1] for mark in marks if mark.name == "parametrize"]
    return not tier_of(marks) and all(any(not tier_of(getattr(case, "marks", ())) for case in cases) for cases in lists)


def all_tests() -> Iterator[str]:
    for file in sorted(Path(__file__).parent.glob("test_*.py")):
        module = importlib.import_module(file.stem)
        for name, value in vars(module).items():
            if name.startswith("test_") and value.__module__ == file.stem:
                yield f"{file.stem}::{name}"
            if name.startswith("Test") and inspect.isclass(value) and value.__module__ == file.stem:
                yield from (f"{file.stem}::{name}::{test}" for test in vars(value) if test.startswith("test_"))


@pytest.mark.parametrize("claim", CLAIMS)
def test_every_claim_has_a_test_in_the_quick_tier(claim: str) -> None:
    assert listed_tests(claim, "quick")
    assert [test for test in listed_tests(claim, "quick") if not has_a_quick_case(test)] == []


def test_every_test_outside_the_quick_tier_belongs_to_a_claim() -> None:
    listed = sorted(test for claim in CLAIMS for test in listed_tests(claim, "full"))
    assert listed == sorted(test for test in all_tests() if not has_a_quick_case(test))
